const tabs = [...document.querySelectorAll('[role="tab"]')];
const panels = tabs.map((tab) => document.getElementById(tab.getAttribute('aria-controls')));

function select(index, focus) {
  tabs.forEach((tab, at) => {
    const chosen = at === index;
    tab.setAttribute('aria-selected', String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    panels[at].hidden = !chosen;
  });
  if (focus) {
    tabs[index].focus();
  }
}

function next(index, key) {
  if (key === 'ArrowRight') {
    return (index + 1) % tabs.length;
  }
  if (key === 'ArrowLeft') {
    return (index - 1 + tabs.length) % tabs.length;
  }
  if (key === 'Home') {
    return 0;
  }
  if (key === 'End') {
    return tabs.length - 1;
  }
  return index;
}

tabs.forEach((tab, index) => {
  tab.addEventListener('click', () => select(index, false));
  tab.addEventListener('keydown', (event) => {
    const target = next(index, event.key);
    if (target !== index) {
      event.preventDefault();
      select(target, true);
    }
  });
});
