const questions = [...document.querySelectorAll('h2 button')];
const all = document.querySelector('#all');

function answer(question) {
  return document.getElementById(question.getAttribute('aria-controls'));
}

function isOpen(question) {
  return question.getAttribute('aria-expanded') === 'true';
}

function set(question, open) {
  question.setAttribute('aria-expanded', String(open));
  answer(question).hidden = !open;
}

function update() {
  const open = questions.filter(isOpen).length;
  document.querySelector('#count').textContent = `${open} of ${questions.length} open`;
  all.textContent = open === questions.length ? 'Close all' : 'Open all';
}

function onKey(event) {
  const at = questions.indexOf(event.target);
  if (event.key === 'ArrowDown' && at < questions.length - 1) {
    questions[at + 1].focus();
  }
  if (event.key === 'ArrowUp' && at > 0) {
    questions[at - 1].focus();
  }
}

function toggleAll() {
  const open = !questions.every(isOpen);
  questions.forEach((question) => set(question, open));
  update();
}

for (const question of questions) {
  question.addEventListener('click', () => {
    set(question, !isOpen(question));
    update();
  });
  question.addEventListener('keydown', onKey);
}
all.addEventListener('click', toggleAll);
update();
