const backdrop = document.querySelector('#backdrop');
const yes = document.querySelector('#yes');
const no = document.querySelector('#no');
let opener = null;

function open(button) {
  opener = button;
  document.querySelector('#question').textContent = `Delete ${button.dataset.file}?`;
  backdrop.hidden = false;
  no.focus();
}

function close() {
  backdrop.hidden = true;
  if (opener.isConnected) {
    opener.focus();
  }
}

function remove() {
  const name = opener.dataset.file;
  opener.closest('tr').remove();
  document.querySelector('#said').textContent = `${name} is gone`;
  close();
}

function onKey(event) {
  if (event.key === 'Escape') {
    close();
  }
  if (event.key === 'Tab') {
    event.preventDefault();
    (document.activeElement === no ? yes : no).focus();
  }
}

for (const button of document.querySelectorAll('button[data-file]')) {
  button.addEventListener('click', () => open(button));
}
backdrop.addEventListener('keydown', onKey);
backdrop.addEventListener('click', (event) => {
  if (event.target === backdrop) {
    close();
  }
});
yes.addEventListener('click', remove);
no.addEventListener('click', close);
