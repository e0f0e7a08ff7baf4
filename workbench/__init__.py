"""Agent logs go in; compact memories, skills and smaller, better models come out."""
