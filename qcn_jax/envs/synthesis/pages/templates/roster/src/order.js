export function matches(person, words) {
  const wanted = words.trim().toLowerCase();
  return wanted === '' || person.name.toLowerCase().includes(wanted) || person.town.toLowerCase().startsWith(wanted);
}

function compare(a, b) {
  if (a === b) {
    return 0;
  }
  return a < b ? -1 : 1;
}

export function sorted(people, order) {
  const sign = order.down ? -1 : 1;
  return [...people].sort((a, b) => sign * compare(a[order.key], b[order.key]) || compare(a.name, b.name));
}
