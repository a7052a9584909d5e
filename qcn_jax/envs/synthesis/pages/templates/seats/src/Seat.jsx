export default function Seat({ name, price, taken, own, locked, onPick }) {
  const state = taken ? 'taken' : own ? 'own' : 'free';
  return (
    <button className={`seat ${state}`} aria-pressed={own} disabled={taken || locked} onClick={onPick}
      aria-label={`Seat ${name}`} title={`${price} EUR`}>
      {name}
    </button>
  );
}
