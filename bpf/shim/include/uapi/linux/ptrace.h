#pragma once
struct pt_regs { unsigned long r[21]; };
