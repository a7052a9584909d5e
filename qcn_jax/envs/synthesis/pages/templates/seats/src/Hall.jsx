import { useEffect, useRef, useState } from 'react';
import Seat from './Seat';
import { price, sum } from './prices';

const ROWS = ['A', 'B', 'C'];
const PLACES = [1, 2, 3, 4, 5];
const TAKEN = ['A2', 'B3', 'C5'];
const LIMIT = 3;

export default function Hall() {
  const [chosen, setChosen] = useState([]);
  const [booked, setBooked] = useState(false);
  const heading = useRef(null);

  useEffect(() => {
    if (booked) {
      heading.current.focus();
    }
  }, [booked]);

  function toggle(name) {
    if (chosen.includes(name)) {
      setChosen(chosen.filter((other) => other !== name));
    } else if (chosen.length < LIMIT) {
      setChosen([...chosen, name].sort());
    }
  }

  if (booked) {
    return (
      <section>
        <h2 tabIndex={-1} ref={heading}>Reserved</h2>
        <p>{chosen.join(', ')} for {sum(chosen)} EUR</p>
      </section>
    );
  }
  const full = chosen.length >= LIMIT;
  return (
    <div className="hall">
      <section aria-labelledby="plan">
        <h2 id="plan">{{plan}}</h2>
        {ROWS.map((row) => (
          <div key={row} className="row" role="group" aria-label={`Row ${row}`}>
            {PLACES.map((place) => {
              const name = `${row}${place}`;
              const own = chosen.includes(name);
              return (
                <Seat key={name} name={name} price={price(name)} taken={TAKEN.includes(name)} own={own}
                  locked={full && !own} onPick={() => toggle(name)} />
              );
            })}
          </div>
        ))}
      </section>
      <aside aria-labelledby="choice">
        <h2 id="choice">{{choice}}</h2>
        {chosen.length === 0 ? <p>Nothing yet</p> : <ul>{chosen.map((name) => <li key={name}>{name}, {price(name)} EUR</li>)}</ul>}
        <p>Total: <output>{sum(chosen)} EUR</output></p>
        {full && <p role="status">No more than {LIMIT}</p>}
        <button disabled={chosen.length === 0} onClick={() => setBooked(true)}>Reserve</button>
      </aside>
    </div>
  );
}
