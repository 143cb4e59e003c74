"""SDM beside other methods on two tasks: word ordering, which is the demo's, and arithmetic."""
