"""How good a picture is: plain callables, the readers behind them, and the judge that asks them in the background."""
