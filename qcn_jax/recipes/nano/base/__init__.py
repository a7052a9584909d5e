"""The packaged base checkpoint of the demonstration, in Hugging Face form; README.md beside this says what made it."""

import pathlib

FOLDER = pathlib.Path(__file__).parent
