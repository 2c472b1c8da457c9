"""The C++ of the CPU extension under AddressSanitizer, UBSan and LeakSanitizer: ``make sanitize``."""
