"""Tasks of pages: templates of our own, defects in HTML, CSS and JavaScript, and what a browser's tests say."""
