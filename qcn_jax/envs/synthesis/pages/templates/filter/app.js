const records = [
  { name: '{{one}} House', year: 1931 },
  { name: '{{two}} Bridge', year: 1887 },
  { name: '{{one}} Tower', year: 1964 },
  { name: 'Old {{two}}', year: 1902 },
];
const search = document.querySelector('#search');
const order = document.querySelector('#order');

function matches(record, words) {
  const text = record.name.toLowerCase();
  return words.every((word) => text.includes(word) || String(record.year).startsWith(word));
}

function compare(a, b) {
  if (order.value === 'year') {
    return a.year - b.year;
  }
  return a.name < b.name ? -1 : 1;
}

function label(count) {
  if (count === 0) {
    return 'Nothing found';
  }
  return count === 1 ? '1 building' : `${count} buildings`;
}

function entry(record) {
  const item = document.createElement('li');
  const year = document.createElement('span');
  year.className = 'year';
  year.textContent = `(${record.year})`;
  item.append(`${record.name} `, year);
  return item;
}

function render() {
  const words = search.value.toLowerCase().split(' ').filter((word) => word !== '');
  const found = records.filter((record) => matches(record, words)).sort(compare);
  document.querySelector('#results').replaceChildren(...found.map(entry));
  const status = document.querySelector('#found');
  status.textContent = label(found.length);
  status.classList.toggle('none', found.length === 0);
}

let timer = 0;
search.addEventListener('input', () => {
  clearTimeout(timer);
  timer = setTimeout(render, 300);
});
search.addEventListener('keydown', (event) => {
  if (event.key === 'Escape') {
    search.value = '';
    render();
  }
});
order.addEventListener('change', render);
render();
