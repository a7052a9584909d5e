import { useEffect, useState } from 'react';
import Question from './Question';
import { QUESTIONS, mark } from './questions';

const SECONDS = 20;

export default function Quiz() {
  const [at, setAt] = useState(-1);
  const [right, setRight] = useState(0);
  const [left, setLeft] = useState(SECONDS);
  const running = at >= 0 && at < QUESTIONS.length;

  useEffect(() => {
    if (!running) {
      return undefined;
    }
    setLeft(SECONDS);
    const timer = setInterval(() => setLeft((seconds) => seconds - 1), 1000);
    return () => clearInterval(timer);
  }, [at, running]);

  useEffect(() => {
    if (left <= 0) {
      setAt((current) => current + 1);
      setLeft(SECONDS);
    }
  }, [left]);

  function answer(good) {
    if (good) {
      setRight(right + 1);
    }
    setAt(at + 1);
  }

  function begin() {
    setRight(0);
    setAt(0);
  }

  if (running) {
    return (
      <section className="quiz">
        <p className="line">
          <span>Question {at + 1} of {QUESTIONS.length}</span>
          <span role="timer" className={left <= 5 ? 'late' : ''}>{left} s</span>
        </p>
        <progress max={QUESTIONS.length} value={at} aria-label="Progress" />
        <Question key={at} question={QUESTIONS[at]} onAnswer={answer} />
      </section>
    );
  }
  return (
    <section className="quiz">
      {at < 0 ? <p>{{intro}}</p> : <p role="status">{right} of {QUESTIONS.length}: {mark(right)}</p>}
      <button onClick={begin}>{at < 0 ? 'Begin' : 'Once more'}</button>
    </section>
  );
}
