def render(r): return "stub"
