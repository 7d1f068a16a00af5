"""Where prompts come from: words drawn here from real fonts, or a folder of the user's own."""
