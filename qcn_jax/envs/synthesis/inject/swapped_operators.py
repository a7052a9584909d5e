"""What an operator becomes when a defect is put in, by its text; one table for the languages that share operators."""

OPPOSITE = {"<": ">=", ">=": "<", ">": "<=", "<=": ">"}
EQUALITY = {"==": "!=", "!=": "=="}
BOUNDARY = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
ARITHMETIC = {"+": "-", "-": "+", "*": "+", "/": "*", "%": "/", "&": "|", "|": "&", "<<": ">>", ">>": "<<"}
AUGMENTED = {"+=": "-=", "-=": "+=", "*=": "+=", "/=": "*=", "|=": "&=", "&=": "|=", "%=": "/="}
# Python has operators that the others lack, and a nearer neighbour for some.
PYTHON_ARITHMETIC = ARITHMETIC | {"//": "/", "%": "//", "**": "*", "^": "|"}
PYTHON_AUGMENTED = AUGMENTED | {"//=": "*=", "%=": "-=", "<<=": ">>=", ">>=": "<<=", "**=": "*="}
