const form = document.querySelector('#form');
const fields = ['name', 'mail', 'guests'].map((id) => document.getElementById(id));
const LARGEST = 8;

function fault(id, value) {
  if (value === '') {
    return 'Please fill this in';
  }
  if (id === 'mail' && !/^\S+@\S+\.\S+$/.test(value)) {
    return 'This is no e-mail address';
  }
  if (id === 'guests') {
    const count = Number(value);
    if (!Number.isInteger(count) || count < 1) {
      return 'Give a whole number';
    }
    if (count > LARGEST) {
      return `At most ${LARGEST} guests`;
    }
  }
  return '';
}

function show(field) {
  const words = fault(field.id, field.value.trim());
  document.getElementById(`${field.id}-error`).textContent = words;
  field.setAttribute('aria-invalid', String(words !== ''));
  return words === '';
}

function thanks(name, count) {
  return `Thank you, ${name}: a table for ${count}`;
}

form.addEventListener('submit', (event) => {
  event.preventDefault();
  const wrong = fields.filter((field) => !show(field));
  if (wrong.length > 0) {
    wrong[0].focus();
    return;
  }
  const [name, , guests] = fields.map((field) => field.value.trim());
  document.querySelector('#done').textContent = thanks(name, guests);
  form.hidden = true;
});
for (const field of fields) {
  field.addEventListener('blur', () => {
    if (field.value !== '') {
      show(field);
    }
  });
}
