export function total(options) {
  return options.reduce((sum, option) => sum + option.votes, 0);
}

export function share(votes, all) {
  return all === 0 ? 0 : Math.round((votes * 100) / all);
}

export function leader(options) {
  let best = options[0];
  for (const option of options) {
    if (option.votes > best.votes) {
      best = option;
    }
  }
  return best.name;
}
