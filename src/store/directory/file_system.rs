//! The file systems on which a lock on a directory does not reach every writer.

use std::os::fd::AsFd;

use rustix::fs::fstatfs;
use rustix::io::Errno;

/// The reach of a lock on a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Locking {
    /// It reaches every process that can write there.
    AllWriters,
    /// It reaches only this host, but other hosts may write there. Contains the name of the file system.
    ThisHost(&'static str),
}

/// The reach of a lock on this directory.
pub(super) fn locking(directory: impl AsFd) -> Result<Locking, Errno> {
    Ok(of_type(i128::from(fstatfs(directory)?.f_type)))
}

/// The file systems that several hosts write to, by the `f_type` of `statfs(2)`. The numbers are from the kernel's
/// linux/magic.h, or from stat.c of GNU coreutils for file systems outside the kernel.
///
/// These file systems do not implement `flock` for directories, with any mount options (`local_lock`, `nolock`): the
/// local kernel keeps the lock. GFS2 and OCFS2 implement it. FUSE is in the list, because it may be anything: sshfs,
/// virtiofs, a cluster.
const OF_SEVERAL_HOSTS: [(u32, &str); 23] = [
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
    (0x0102_1997, "9p"),
    (0x6573_5546, "FUSE"),
    (0x00c3_6400, "Ceph"),
    (0x5346_414f, "AFS"),
    (0x6b41_4653, "AFS"),
    (0x7375_7245, "Coda"),
    (0x564c, "NCP"),
    (0x786f_4256, "a VirtualBox shared folder"),
    (0x2003_0528, "OrangeFS"),
    (0x0bd0_0bd0, "Lustre"),
    (0x4750_4653, "GPFS"),
    (0x1983_0326, "BeeGFS"),
    (0xaad7_aaea, "PanFS"),
    (0xbeef_dead, "SNFS"),
    (0x0131_11a8, "IBRIX"),
    (0x6163_6673, "ACFS"),
    (0x7c7c_6673, "a Parallels shared folder"),
    (0xbacb_acbc, "a VMware shared folder"),
    (0xa501_fcf5, "VxFS"),
];

fn of_type(f_type: i128) -> Locking {
    // `f_type` is signed on some machines, so the largest numbers are negative there.
    let found = OF_SEVERAL_HOSTS.iter().find(|(number, _)| i128::from(*number) == f_type & 0xffff_ffff);
    found.map_or(Locking::AllWriters, |(_, name)| Locking::ThisHost(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_reaches_all_writers_on_a_local_file_system() {
        // ext4, XFS, Btrfs, tmpfs, overlayfs, ZFS, GFS2, OCFS2
        for f_type in
            [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994, 0x794c_7630, 0x2fc1_2fc1, 0x0116_1970, 0x7461_636f]
        {
            assert_eq!(of_type(f_type), Locking::AllWriters, "{f_type:#x}");
        }
        assert_eq!(locking(std::fs::File::open("/proc").unwrap()), Ok(Locking::AllWriters));
    }

    #[test]
    fn a_lock_reaches_one_host_on_a_file_system_of_several() {
        assert_eq!(of_type(0x6969), Locking::ThisHost("NFS"));
        assert_eq!(of_type(0x6573_5546), Locking::ThisHost("FUSE"));
        assert_eq!(of_type(0xff53_4d42), Locking::ThisHost("CIFS"));
        // The number on a machine with 32 bits.
        assert_eq!(of_type(i128::from(0xff53_4d42_u32.cast_signed())), Locking::ThisHost("CIFS"));
    }
}
