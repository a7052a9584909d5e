// A value as a literal; null where it has none.
function __qcnText(value, depth = 0) {
  if (value === null || ['undefined', 'boolean'].includes(typeof value)) return String(value);
  if (typeof value === 'number') return Object.is(value, -0) ? '-0' : String(value);
  if (typeof value === 'bigint') return `${value}n`;
  if (typeof value === 'string') {
    return "'" + JSON.stringify(value).slice(1, -1).replace(/\\"/g, '"').replace(/'/g, "\\'") + "'";
  }
  if (typeof value !== 'object' || depth > 5) return null;
  const kind = Object.getPrototypeOf(value);
  let parts;
  if (Array.isArray(value)) {
    parts = Array.from(value, (one) => __qcnText(one, depth + 1));
    return parts.includes(null) ? null : `[${parts.join(', ')}]`;
  }
  if (kind !== null && Object.getPrototypeOf(kind) !== null) return null;
  const name = (key) => (/^[A-Za-z_$][\w$]*$/.test(key) ? key : JSON.stringify(key));
  parts = Object.entries(value).map(([key, one]) => [name(key), __qcnText(one, depth + 1)]);
  if (parts.some(([, text]) => text === null)) return null;
  return parts.length ? `{ ${parts.map((part) => part.join(': ')).join(', ')} }` : '{}';
}
