"""`python -m picardopt_3d.doctor`."""

from picardopt_3d.doctor.command import main

if __name__ == "__main__":
    main()
