# A guest that boots in no time, without a disk: a kernel by the rules of Multiboot, which QEMU's -kernel starts in
# 32-bit mode without paging.
#
# It fills memory from `first` to `end` with words that differ from address to address. From then on it works in steps.
# It checks the next `still_step` bytes from `first` to `moving`, which stay as they are, and checks and rewrites the
# next `moving_step` bytes from `moving` to `end`. A step takes at least `period` ticks of ACPI's timer of 3.579545 MHz.
# When all from `moving` on is rewritten, a round is over. The words tell the round, so that a page of an earlier one is
# an error. It prints "tick ROUND", in hexadecimal, or "bad ROUND ADDRESS", and then no more.

.intel_syntax noprefix
.code32

.set MAGIC, 0x1badb002
.set HAS_ADDRESSES, 0x10000
.set SERIAL, 0x3f8
.set TIMER, 0x608
.set KEY, 0x9e3779b1

.globl _start
_start:
  .long MAGIC, HAS_ADDRESSES, -(MAGIC + HAS_ADDRESSES)
  .long _start, _start, end_of_program, end_of_program, entry
# tests/toy_guest.py writes these.
first:       .long 0
moving:      .long 0
end:         .long 0
still_step:  .long 0
moving_step: .long 0
period:      .long 0

# Where the next step begins.
still_at:    .long 0
moving_at:   .long 0

# The word of round 0 in each of the 16 bytes at edi, in eax.
.macro word_at_edi
  imul eax, edi, KEY
.endm

entry:
  mov esp, 0x7000
  mov edi, [first]
fill:
  word_at_edi
  mov [edi], eax
  mov [edi + 4], eax
  mov [edi + 8], eax
  mov [edi + 12], eax
  add edi, 16
  cmp edi, [end]
  jb fill
  mov eax, [first]
  mov [still_at], eax
  mov eax, [moving]
  mov [moving_at], eax
  xor ebp, ebp                  # the round

step:
  mov dx, TIMER
  in eax, dx
  mov esi, eax
  mov edi, [still_at]
  mov ebx, edi
  add ebx, [still_step]
look:
  cmp edi, ebx
  jae looked
  word_at_edi
  cmp [edi], eax
  jne bad
  cmp [edi + 4], eax
  jne bad
  cmp [edi + 8], eax
  jne bad
  cmp [edi + 12], eax
  jne bad
  add edi, 16
  jmp look
looked:
  cmp edi, [moving]
  jb more
  mov edi, [first]
more:
  mov [still_at], edi

  mov edi, [moving_at]
  mov ebx, edi
  add ebx, [moving_step]
change:
  cmp edi, ebx
  jae changed
  word_at_edi
  add eax, ebp
  cmp [edi], eax
  jne bad
  cmp [edi + 4], eax
  jne bad
  cmp [edi + 8], eax
  jne bad
  cmp [edi + 12], eax
  jne bad
  inc eax
  mov [edi], eax
  mov [edi + 4], eax
  mov [edi + 8], eax
  mov [edi + 12], eax
  add edi, 16
  jmp change
changed:
  mov [moving_at], edi

wait:
  mov dx, TIMER
  in eax, dx
  sub eax, esi
  and eax, 0xffffff
  cmp eax, [period]
  jb wait
  cmp edi, [end]
  jb step

  mov eax, [moving]
  mov [moving_at], eax
  inc ebp
  mov esi, offset tick
  call print
  mov ebx, ebp
  call print_number
  mov al, '\n'
  call print_character
  jmp step

bad:
  mov esi, offset error
  call print
  mov ebx, ebp
  call print_number
  mov al, ' '
  call print_character
  mov ebx, edi
  call print_number
  mov al, '\n'
  call print_character
  cli
halt:
  hlt
  jmp halt

# Print the text at esi.
print:
  lodsb
  test al, al
  jz printed
  call print_character
  jmp print
printed:
  ret

# Print ebx.
print_number:
  mov ecx, 8
digit:
  rol ebx, 4
  mov al, bl
  and al, 15
  add al, '0'
  cmp al, '9'
  jbe decimal
  add al, 'a' - '9' - 1
decimal:
  call print_character
  loop digit
  ret

# Print al when the serial port has room for it.
print_character:
  mov ah, al
  mov dx, SERIAL + 5
full:
  in al, dx
  test al, 0x20
  jz full
  mov al, ah
  mov dx, SERIAL
  out dx, al
  ret

tick:  .asciz "tick "
error: .asciz "bad "
end_of_program:
