"""What a budget buys: scaling law, memory, layout, speed and the rules that go from small runs to large ones."""
