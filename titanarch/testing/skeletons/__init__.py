"""What ``titanarch new`` writes under another name: components that keep the contract, and tests of them. Nothing imports them."""
