//go:build 386 || amd64 || arm || arm64 || loong64 || riscv64 || s390x

package main

import (
	"os"
	"syscall"
)

// ficlone is FICLONE of linux/fs.h. Its value is different on some processors.
const ficlone = 0x40049409

// clone copies the content of src to dst, an empty file. The two share disk space until one
// of them changes. Few file systems support it, among them Btrfs, XFS and ZFS.
func clone(dst, src *os.File) error {
	from, err := src.SyscallConn()
	if err != nil {
		return err
	}
	to, err := dst.SyscallConn()
	if err != nil {
		return err
	}
	var errno syscall.Errno
	var toErr error
	err = from.Control(func(srcFD uintptr) {
		toErr = to.Control(func(dstFD uintptr) {
			_, _, errno = syscall.Syscall(syscall.SYS_IOCTL, dstFD, ficlone, srcFD)
		})
	})
	switch {
	case err != nil:
		return err
	case toErr != nil:
		return toErr
	case errno != 0:
		return os.NewSyscallError("ioctl FICLONE", errno)
	}
	return nil
}
