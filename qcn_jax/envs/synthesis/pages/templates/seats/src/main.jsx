import { createRoot } from 'react-dom/client';
import Hall from './Hall';

createRoot(document.querySelector('#root')).render(<Hall />);
