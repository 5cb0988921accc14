"""What a task is: where its rows come from, how they are split, checked, encoded and ordered."""
