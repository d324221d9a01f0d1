"""What turns the notebooks into a course: exercises that check themselves, predictions, quizzes, a preflight, a projector look.

exercise → mlp, scaling, mechanics, digit_9, your_turn: the exercises and the quiz of each notebook.
"""
