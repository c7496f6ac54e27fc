"""The stages of a run, from its flags: folder, data, models, teacher, student, what both are worth."""
