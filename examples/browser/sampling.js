// Which token comes next.

/** One token of `logits`: the likeliest at temperature 0, else by chance among the `top_k` and `top_p`. */
export function choose(logits, { temperature = 0, top_k = 0, top_p = 1 }) {
  if (!temperature) return likeliest(logits);
  const order = Array.from(logits, (_, token) => token).sort((a, b) => logits[b] - logits[a]);
  const kept = top_k ? order.slice(0, top_k) : order;
  const weights = kept.map((token) => Math.exp((logits[token] - logits[kept[0]]) / temperature));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  let within = 0;
  const count = weights.findIndex((weight) => (within += weight / total) >= top_p) + 1 || weights.length;
  let left = Math.random() * weights.slice(0, count).reduce((sum, weight) => sum + weight, 0);
  const place = weights.slice(0, count).findIndex((weight) => (left -= weight) <= 0);
  return kept[place < 0 ? count - 1 : place];
}

function likeliest(logits) {
  let best = 0;
  for (let token = 1; token < logits.length; token++) if (logits[token] > logits[best]) best = token;
  return best;
}
