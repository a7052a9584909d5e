import { createRoot } from 'react-dom/client';
import Poll from './Poll';

createRoot(document.querySelector('#root')).render(<Poll />);
