"""The same recipe under several losses, lags and seeds, side by side: `oapl compare`."""
