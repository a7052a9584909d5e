import { useMemo, useState } from 'react';
import Heading from './Heading';
import { matches, sorted } from './order';

const PEOPLE = [
  { name: '{{one}}', town: 'Delft', points: 12 },
  { name: '{{two}}', town: 'Bergen', points: 40 },
  { name: '{{three}}', town: 'Arles', points: 7 },
  { name: '{{four}}', town: 'Cadiz', points: 40 },
];
const COLUMNS = [['name', '{{name}}'], ['town', 'Town'], ['points', 'Points']];

export default function Roster() {
  const [order, setOrder] = useState({ key: 'name', down: false });
  const [words, setWords] = useState('');
  const [picked, setPicked] = useState(new Set());
  const rows = useMemo(
    () => sorted(PEOPLE.filter((person) => matches(person, words)), order),
    [words, order],
  );

  function sortBy(key) {
    setOrder({ key, down: order.key === key && !order.down });
  }

  function pick(name) {
    const next = new Set(picked);
    if (!next.delete(name)) {
      next.add(name);
    }
    setPicked(next);
  }

  return (
    <>
      <div className="tools">
        <label htmlFor="search">Search</label>
        <input id="search" value={words} onChange={(event) => setWords(event.target.value)} />
        <button onClick={() => setWords('')} disabled={words === ''}>Clear</button>
      </div>
      <table>
        <thead>
          <tr>
            <th>Pick</th>
            {COLUMNS.map(([key, title]) => (
              <Heading key={key} title={title} order={order.key === key ? order : null} onSort={() => sortBy(key)} />
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map((person) => (
            <tr key={person.name} className={picked.has(person.name) ? 'picked' : undefined}>
              <td>
                <input type="checkbox" aria-label={`Pick ${person.name}`} checked={picked.has(person.name)}
                  onChange={() => pick(person.name)} />
              </td>
              <td>{person.name}</td>
              <td className="town">{person.town}</td>
              <td className="points">{person.points}</td>
            </tr>
          ))}
        </tbody>
      </table>
      {rows.length === 0 && <p>Nobody found</p>}
      <p role="status">{rows.length} of {PEOPLE.length} shown, {picked.size} picked</p>
    </>
  );
}
