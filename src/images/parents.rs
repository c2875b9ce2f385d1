//! The names of the file that an image stands on.
//!
//! Windows does not tell `Base.vhdx` from `BASE.VHDX`, and neither do the tools that write parent
//! locators. So where none of the paths of a locator is there as it is written, those are tried that
//! differ from it only in upper and lower case. Whatever is found must have the right GUID, so
//! looking in one place more does no harm.

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use crate::block::open_gate;
use crate::formats::vhdx::locator::Locator;

/// The names that the details of the image at `from` give its backing file, the one to try first
/// first. None if it has none.
pub(super) fn backing_names(from: &Path, details: &Value) -> Vec<String> {
    let Some(locator) = details["parent-locator"].as_object() else {
        return details["backing-filename"].as_str().map(String::from).into_iter().collect();
    };
    let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
    let entries = locator.iter().map(|(key, value)| (key.clone(), text(value))).collect();
    of_locator(from, &Locator { entries })
}

/// The names that a locator in the image at `from` gives the parent, the one to try first first.
pub(super) fn of_locator(from: &Path, locator: &Locator) -> Vec<String> {
    let mut names = locator.paths();
    let is_there = |name: &String| open_gate::combine(from, name).symlink_metadata().is_ok();
    if !names.iter().any(is_there) {
        let respelled: Vec<_> = names.iter().filter_map(|name| respelled(from, name)).collect();
        names.extend(respelled);
    }
    names
}

/// The name of a file that is there, and differs from `name` only in upper and lower case.
fn respelled(from: &Path, name: &str) -> Option<String> {
    let mut found = PathBuf::new();
    for component in Path::new(name).components() {
        let next = match component {
            Component::Normal(_)
                if !open_gate::combine(from, found.join(component).to_str()?).exists() =>
            {
                let dir = match found.as_os_str().is_empty() {
                    true => open_gate::directory_of(from).to_path_buf(),
                    false => open_gate::combine(from, found.to_str()?),
                };
                the_only_one_like(&dir, component.as_os_str().to_str()?)?
            }
            component => component.as_os_str().to_os_string(),
        };
        found.push(next);
    }
    found.into_os_string().into_string().ok()
}

/// The only entry of a directory that has this name but for upper and lower case. Of several none is
/// taken: that would be a guess.
fn the_only_one_like(dir: &Path, name: &str) -> Option<OsString> {
    let name = name.to_lowercase();
    let entries = std::fs::read_dir(dir).ok()?.flatten().map(|entry| entry.file_name());
    let mut alike =
        entries.filter(|entry| entry.to_str().is_some_and(|e| e.to_lowercase() == name));
    alike.next().filter(|_| alike.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn upper_and_lower_case_matter_only_where_the_file_is_there_as_written() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("child.avhdx");
        std::fs::create_dir(dir.path().join("Disks")).unwrap();
        let put = |name: &str| std::fs::write(dir.path().join(name), "").unwrap();
        let names = |relative: &str| {
            backing_names(&from, &json!({"parent-locator": {"relative_path": relative}}))
        };
        assert_eq!(names(".\\BASE.VHDX"), ["BASE.VHDX"]);
        put("Base.vhdx");
        assert_eq!(names(".\\BASE.VHDX"), ["BASE.VHDX", "Base.vhdx"]);
        put("Disks/Größe.vhdx");
        assert_eq!(
            names(".\\disks\\GRÖSSE.vhdx"),
            ["disks/GRÖSSE.vhdx", "GRÖSSE.vhdx"],
            "another number of letters"
        );
        let written = "disks/GRÖßE.VHDX";
        assert_eq!(names(written), [written, "GRÖßE.VHDX", "Disks/Größe.vhdx"]);
        // Two that are alike: neither.
        put("base.VHDX");
        assert_eq!(names(".\\BASE.VHDX"), ["BASE.VHDX"]);
        put("BASE.VHDX");
        assert_eq!(names(".\\BASE.VHDX"), ["BASE.VHDX"]);
    }

    #[test]
    fn absolute_names_and_those_of_directories_above_are_respelled_too() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("VMs/One")).unwrap();
        std::fs::write(dir.path().join("VMs/base.vhdx"), "").unwrap();
        let from = dir.path().join("VMs/One/child.vhdx");
        assert_eq!(respelled(&from, "../BASE.vhdx").unwrap(), "../base.vhdx");
        assert_eq!(respelled(&from, "../../vms/BASE.vhdx").unwrap(), "../../VMs/base.vhdx");
        let absolute = dir.path().join("vms/Base.vhdx");
        let there = dir.path().join("VMs/base.vhdx");
        assert_eq!(respelled(&from, absolute.to_str().unwrap()).unwrap(), there.to_str().unwrap());
        assert_eq!(respelled(&from, "../none.vhdx"), None);
    }
}
