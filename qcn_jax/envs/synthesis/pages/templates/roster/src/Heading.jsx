export default function Heading({ title, order, onSort }) {
  const direction = order && (order.down ? 'descending' : 'ascending');
  return (
    <th aria-sort={direction ?? undefined}>
      <button className="sort" onClick={onSort}>
        {title}
        {order && <span aria-hidden="true">{order.down ? ' ▾' : ' ▴'}</span>}
      </button>
    </th>
  );
}
