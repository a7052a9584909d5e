const PRICES = { A: 30, B: 20, C: 12 };

export function price(name) {
  const middle = name.endsWith('3');
  return PRICES[name[0]] + (middle ? 5 : 0);
}

export function sum(names) {
  let all = 0;
  for (const name of names) {
    all += price(name);
  }
  return names.length >= 3 ? all - 4 : all;
}
