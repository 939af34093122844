"""Time derivatives of solutions, of any order."""
