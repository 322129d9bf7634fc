"""Trains from Python: run = train(student=.., data=.., teacher=.., grader=..)."""
