//! The options of `vublk serve` for the sockets that it makes, and who may use them.

use std::path::{Path, PathBuf};

use clap::Args;
use rustix::fs::Gid;

use crate::device::server::{ServerSocket, SocketRights};
use crate::error::{Error, ErrorKind, Result, ResultExt};

/// Permissions of a socket that is given to a group.
const SHARED_WITH_GROUP: u32 = 0o660;

/// Who may use the sockets of the disks.
#[derive(Clone, Debug, Default, Args)]
pub struct DiskSocketArgs {
    /// Give the sockets of disks to this group (a name or a number), so that front-ends of other users
    /// who belong to it may connect
    #[arg(id = "socket-group", long, value_name = "GROUP", conflicts_with = "fd")]
    group: Option<String>,
    /// Permissions of the sockets of disks, in octal; what the umask leaves if not given, with
    /// --socket-group 660
    #[arg(id = "socket-mode", long, value_name = "MODE", value_parser = parse_mode, conflicts_with = "fd")]
    mode: Option<u32>,
}

impl DiskSocketArgs {
    /// What to give a socket; nothing if it is left to the umask.
    ///
    /// # Errors
    /// The group is unknown.
    pub fn rights(&self) -> Result<Option<SocketRights>> {
        let group = find_named(self.group.as_deref(), "--socket-group")?;
        let mode = self.mode.or(group.map(|_| SHARED_WITH_GROUP));
        Ok(mode.map(|mode| SocketRights { mode, group }))
    }

    /// Refuses options for a socket that somebody else has made.
    ///
    /// # Errors
    /// If there are any.
    pub fn check_none(&self) -> Result<()> {
        if self.group.is_none() && self.mode.is_none() {
            return Ok(());
        }
        Err(Error::invalid(
            "--socket-group and --socket-mode are for sockets that vublk makes (--socket-path); systemd \
             has SocketGroup= and SocketMode=",
        ))
    }
}

/// The control socket, and who may use it.
#[derive(Clone, Debug, Default, Args)]
pub struct ControlArgs {
    /// Take commands (QMP) on this Unix socket; a stale one is replaced. Whoever may connect to it
    /// has the disks: it is the owner's alone unless the next two options say otherwise
    #[arg(long = "control", value_name = "PATH")]
    path: Option<PathBuf>,
    /// Give the control socket to this group (a name or a number), whose members may use it
    #[arg(long = "control-group", value_name = "GROUP", requires = "path")]
    group: Option<String>,
    /// Permissions of the control socket, in octal; 600 if not given, with --control-group 660
    #[arg(long = "control-mode", value_name = "MODE", requires = "path", value_parser = parse_mode)]
    mode: Option<u32>,
}

impl ControlArgs {
    /// Refuses the disk's socket as the control socket, before either is made.
    ///
    /// # Errors
    /// If they are the same.
    pub fn check_not(&self, disk: Option<&Path>) -> Result<()> {
        match &self.path {
            Some(path) if Some(path.as_path()) == disk => Err(Error::invalid(format!(
                "--control {}: is the socket of the disk; give the control socket a path of its own",
                path.display()
            ))),
            _ => Ok(()),
        }
    }

    /// Makes the socket, if one is wanted.
    ///
    /// # Errors
    /// The path is of no use, or the group unknown.
    pub fn socket(&self) -> Result<Option<ServerSocket>> {
        let Some(path) = &self.path else { return Ok(None) };
        let group = find_named(self.group.as_deref(), "--control-group")?;
        let mode = self.mode.unwrap_or(if group.is_some() { SHARED_WITH_GROUP } else { 0o600 });
        let rights = SocketRights { mode, group };
        ServerSocket::bind(path, Some(rights)).context(|| "--control").map(Some)
    }
}

fn parse_mode(text: &str) -> Result<u32> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| Error::invalid("permissions are an octal number from 0 to 777"))
}

/// The number of the group that `option` names, if it is given.
fn find_named(name: Option<&str>, option: &str) -> Result<Option<Gid>> {
    name.map(|name| find_group(name).context(|| option)).transpose()
}

/// The number of a group, by `/etc/group`.
fn find_group(name: &str) -> Result<Gid> {
    if let Ok(number) = name.parse::<u32>()
        && number != u32::MAX
    {
        return Ok(Gid::from_raw(number));
    }
    let groups = std::fs::read_to_string("/etc/group").context(|| "/etc/group")?;
    let number = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        if fields.next() != Some(name) {
            return None;
        }
        fields.nth(1)?.parse::<u32>().ok()
    });
    number.map(Gid::from_raw).ok_or_else(|| {
        Error::new(
            ErrorKind::NotFound,
            format!("{name}: /etc/group has no such group; a number is taken, too"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_have_names_and_numbers() {
        assert_eq!(find_group("0").unwrap().as_raw(), 0);
        assert_eq!(find_group("root").unwrap().as_raw(), 0);
        let err = find_group("no such group").unwrap_err().to_string();
        assert!(err.contains("no such group"), "{err}");
    }

    #[test]
    fn modes_are_octal() {
        assert_eq!(parse_mode("660").unwrap(), 0o660);
        for text in ["", "8", "1777", "rw"] {
            assert!(parse_mode(text).is_err(), "{text}");
        }
    }
}
