"""Files, tables of text, errors and progress: helpers of all other rooms."""
