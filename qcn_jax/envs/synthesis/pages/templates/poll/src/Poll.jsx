import { useState } from 'react';
import Result from './Result';
import { leader, total } from './votes';

const START = [
  { name: '{{one}}', votes: 7 },
  { name: '{{two}}', votes: 2 },
  { name: '{{three}}', votes: 0 },
];

export default function Poll() {
  const [options, setOptions] = useState(START);
  const [choice, setChoice] = useState('');
  const [voted, setVoted] = useState(false);

  function add(by) {
    setOptions(options.map((option) => (
      option.name === choice ? { ...option, votes: option.votes + by } : option
    )));
  }

  function vote(event) {
    event.preventDefault();
    add(1);
    setVoted(true);
  }

  function reconsider() {
    add(-1);
    setVoted(false);
  }

  if (voted) {
    return (
      <section className="card" aria-labelledby="results">
        <h2 id="results">Results</h2>
        <ul className="results">
          {options.map((option) => (
            <Result key={option.name} option={option} total={total(options)} own={option.name === choice} />
          ))}
        </ul>
        <p role="status">Ahead: {leader(options)}</p>
        <button onClick={reconsider}>Change my vote</button>
      </section>
    );
  }
  return (
    <form className="card" onSubmit={vote}>
      <fieldset>
        <legend>{{question}}</legend>
        {options.map((option) => (
          <label key={option.name} className="choice">
            <input type="radio" name="choice" checked={choice === option.name} onChange={() => setChoice(option.name)} />
            {option.name}
          </label>
        ))}
      </fieldset>
      <button disabled={choice === ''}>Vote</button>
    </form>
  );
}
