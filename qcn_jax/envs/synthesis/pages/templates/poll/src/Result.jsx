import { share } from './votes';

export default function Result({ option, total, own }) {
  const percent = share(option.votes, total);
  return (
    <li className={own ? 'result own' : 'result'}>
      <span className="name">{option.name}{own && ' (your vote)'}</span>
      <span className="track"><span className="bar" style={{ width: `${percent}%` }} /></span>
      <span className="percent">{percent} %</span>
    </li>
  );
}
