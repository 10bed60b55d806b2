"""The coursework grader: see README.md in this folder, and docs/instructors.md for grading a class."""
