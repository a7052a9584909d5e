import { createRoot } from 'react-dom/client';
import Quiz from './Quiz';

createRoot(document.querySelector('#root')).render(<Quiz />);
