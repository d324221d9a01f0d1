"""What turns the notebooks into a course.

exercise.py: exercises that check themselves. ex1 to ex5: the exercises and the quiz of each notebook.
predict.py and quiz.py: guesses and quizzes. preflight.py and projector.py: for a teacher, before a lesson.
"""
