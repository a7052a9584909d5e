import { createRoot } from 'react-dom/client';
import Roster from './Roster';

createRoot(document.querySelector('#root')).render(<Roster />);
