import { useState } from 'react';

export default function Question({ question, onAnswer }) {
  const [hint, setHint] = useState(false);
  return (
    <>
      <h2>{question.text}</h2>
      <ul className="answers">
        {question.answers.map((text, index) => (
          <li key={text}>
            <button onClick={() => onAnswer(index === question.right)}>{text}</button>
          </li>
        ))}
      </ul>
      <button className="plain" aria-expanded={hint} onClick={() => setHint(!hint)}>Hint</button>
      {hint && <p className="hint">{question.hint}</p>}
    </>
  );
}
