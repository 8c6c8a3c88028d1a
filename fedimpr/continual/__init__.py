"""Continual updates: tasks that arrive one after another, and what is measured along the way."""
