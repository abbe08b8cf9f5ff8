"""What `quire demo` shows: scenes.py says what is asked, stage.py asks it and shows the answers."""
