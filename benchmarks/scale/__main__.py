"""`python -m benchmarks.scale`: see `measure`, which is a module so that its functions can be called in processes."""

from benchmarks.scale.measure import main

if __name__ == "__main__":
    main()
