//! Knowing a parent that changes.
//!
//! A child knows its parent by the parent's DataWriteGuid, which is a new one after a change. So that a
//! child cannot show wrong data: what it leaves to its parent is what the parent had when the child
//! was made. A commit changes the parent only where the child hides it, and then the child is as good
//! as before. Its locator has room for two GUIDs (`parent_linkage2` is all zeros usually), so it can
//! know the parent before and after:
//!
//! ```text
//!                        parent has   child says
//!                        A            A, 0
//! the parent says which GUID it will have (B)
//! follow(B)              A            A, B
//! first write            B            A, B         the commit
//! follow(B)              B            B, 0
//! ```
//!
//! Each step is durable before the next, and writes only one of the two, and not the one that the
//! parent has. So the child knows its parent at any instant, a write torn in the middle included.
//! Other children of the parent do not: they show what the parent had, and are refused.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::disk;
use super::layout::{Guid, PAGE, guid};
use super::locator::Locator;
use super::{ALL, Vhdx};
use crate::block::{ExtentKind, Format};
use crate::error::{Error, Result, ResultExt};
use crate::io::File;
use crate::units::{ByteRange, align_down, align_up};

/// The keys that name the parent's GUID.
const KEYS: [&str; 2] = ["parent_linkage", "parent_linkage2"];

fn text_of(guid: Guid) -> String {
    format!("{{{guid}}}")
}

impl Vhdx {
    /// The DataWriteGuid that the image has once it has changed.
    pub(super) fn next_data_guid(&self) -> Guid {
        match self.started.load(Ordering::Acquire) {
            true => self.headers.lock().unwrap().current.data_write_guid,
            false => *self.next_data_guid.lock().unwrap(),
        }
    }

    /// Has the locator know the parent as it is, and as it is when its GUID is `next`. Nothing may be in
    /// flight; durable on return.
    ///
    /// # Errors
    /// If the locator has no room for that; then nothing has changed.
    pub(super) async fn follow_parent(&self, next: Guid) -> Result<()> {
        self.check_writable()?;
        let _alone = self.framing.exclusive(ALL).await;
        let parent = self.backing().ok_or_else(|| Error::invalid("has no parent"))?;
        self.know(super::data_guid_of(&parent)?, next).await
    }

    /// Has the locator know a parent that has this GUID, if the image was opened without its parent and
    /// holds nothing: then it shows what any parent has. Durable on return.
    ///
    /// # Errors
    /// As [`Vhdx::follow_parent`].
    pub(super) async fn adopt_parent(&self, guid: Guid) -> Result<bool> {
        let may = self.alone && !self.read_only && self.geometry().has_parent;
        if !may || self.backing().is_some() || !self.is_blank().await? {
            return Ok(false);
        }
        self.check_writable()?;
        let _alone = self.framing.exclusive(ALL).await;
        self.know(guid, guid).await?;
        Ok(true)
    }

    /// Whether all of the disk is the parent's.
    async fn is_blank(&self) -> Result<bool> {
        let mut rest = ByteRange { offset: 0, len: self.geometry().disk_size };
        while !rest.is_empty() {
            let extent = self.map_run(rest).await?;
            if !matches!(extent.kind, ExtentKind::Backing) {
                return Ok(false);
            }
            rest = ByteRange::between(extent.range.end(), rest.end());
        }
        Ok(true)
    }

    /// Has the locator know a parent by what it has, and by what it will have.
    async fn know(&self, now: Guid, next: Guid) -> Result<()> {
        let context = || format!("{}: its parent locator", self.name());
        let known = self.known_linkages().context(context)?;
        let steps = steps(known, now, next);
        if steps.is_empty() {
            return Ok(());
        }
        let places = self.linkage_places().await.context(context)?;
        self.empty_log().await?;
        self.start_redo().await?;
        for (which, guid) in steps {
            let written = write_text(&self.file, places[which], &text_of(guid)).await;
            self.poisoning(written.context(context))?;
            self.note_linkage(KEYS[which], &text_of(guid));
        }
        Ok(())
    }

    /// What the locator says, under either key.
    fn known_linkages(&self) -> Result<[Guid; 2]> {
        let structure = self.structure();
        let locator = structure.metadata.parent.as_ref();
        let of = |key| locator.and_then(|locator| locator.get(key)).and_then(Guid::parse);
        // What is no GUID matches nothing.
        Ok(KEYS.map(|key| of(key).unwrap_or(Guid::ZERO)))
    }

    /// Where in the file the values of the keys are.
    async fn linkage_places(&self) -> Result<[ByteRange; 2]> {
        let structure = self.structure();
        let is_it = |item: &&super::metadata::Item| {
            item.guid == guid::PARENT_LOCATOR && item.flags & 1 == 0
        };
        let item = structure.metadata.items.iter().find(is_it).map(|item| item.range);
        let item = item.ok_or_else(|| Error::invalid("is not there"))?;
        let (start, bytes) = read_around(&self.file, item).await?;
        let bytes = &bytes[(item.offset - start) as usize..][..item.len as usize];
        let len = text_of(Guid::ZERO).len() as u64 * 2;
        let mut places = [ByteRange::default(); 2];
        for (place, key) in places.iter_mut().zip(KEYS) {
            let value = Locator::place_of(bytes, key).filter(|value| value.len == len);
            let value = value.ok_or_else(|| {
                Error::unsupported(format!(
                    "has no room for a second GUID of the parent ('{key}'): killed in the middle of a \
                     change of the parent, the chain could not be opened any more. Convert the chain to \
                     one image instead (vublk convert)"
                ))
            })?;
            *place = ByteRange { offset: item.offset + value.offset, len };
        }
        Ok(places)
    }

    fn note_linkage(&self, key: &str, text: &str) {
        let mut structure = self.structure.write().unwrap();
        let entries = structure.metadata.parent.iter_mut().flat_map(|parent| &mut parent.entries);
        for (_, value) in entries.filter(|(name, _)| name == key) {
            *value = text.to_string();
        }
    }
}

/// What to write where, so that a locator which knows `known` comes to know `now` and `next`, and
/// nothing else. `now` is known already.
fn steps(known: [Guid; 2], now: Guid, next: Guid) -> Vec<(usize, Guid)> {
    let goal = [now, if next == now { Guid::ZERO } else { next }];
    let mut at = known;
    let mut steps = Vec::new();
    let mut put = |which: usize, guid: Guid| {
        if at[which] != guid {
            at[which] = guid;
            steps.push((which, guid));
        }
    };
    if known[0] != now {
        // The second is what is known of it, and stays until the first says the same.
        put(0, now);
    }
    put(1, goal[1]);
    steps
}

async fn read_around(file: &Arc<dyn File>, range: ByteRange) -> Result<(u64, Vec<u8>)> {
    let start = align_down(range.offset, PAGE);
    let end = align_up(range.end(), PAGE).unwrap_or(start);
    Ok((start, disk::read(file, start, end - start).await?))
}

/// Writes a text of 16-bit characters; durable on return.
async fn write_text(file: &Arc<dyn File>, place: ByteRange, text: &str) -> Result<()> {
    let (start, mut bytes) = read_around(file, place).await?;
    let text: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    bytes[(place.offset - start) as usize..][..text.len()].copy_from_slice(&text);
    disk::write(file, start, &bytes).await?;
    file.flush().await
}

#[cfg(test)]
mod tests {
    use super::super::create::{self, CreateOptions, Parent};
    use super::super::testing::*;
    use super::super::{OpenOptions, Structure};
    use super::*;
    use crate::block::{Driver, Node, NodeOptions};
    use crate::io::block_on;
    use crate::io::sim::{Sim, SimFile, SimTask};
    use crate::units::MIB;

    #[test]
    fn the_parent_is_known_at_each_step() {
        let guid = |n: u8| if n == 0 { Guid::ZERO } else { Guid([n; 16]) };
        let of = |known: [u8; 2], now, next| -> Vec<(usize, u8)> {
            let found = steps(known.map(guid), guid(now), guid(next));
            found.into_iter().map(|(which, guid)| (which, guid.0[0])).collect()
        };
        assert_eq!(of([1, 0], 1, 2), [(1, 2)]);
        assert_eq!(of([1, 2], 2, 2), [(0, 2), (1, 0)]);
        assert_eq!(of([2, 0], 2, 2), []);
        // Killed after the first write of the parent, and done again with another GUID.
        assert_eq!(of([1, 2], 2, 3), [(0, 2), (1, 3)]);
        assert_eq!(of([1, 2], 1, 3), [(1, 3)]);
        assert_eq!(of([2, 2], 2, 3), [(1, 3)]);
    }

    const SIZE: u64 = 3 * MIB;

    fn new_image(name: &str, parent: Option<Parent>) -> SimFile {
        let file = SimFile::new(name);
        let options = CreateOptions { block_size: MIB, parent, ..CreateOptions::new(SIZE) };
        block_on(create::create(&(Arc::new(file.clone()) as Arc<dyn File>), &options)).unwrap();
        file
    }

    fn structure(file: &SimFile) -> Structure {
        block_on(Structure::read(&(Arc::new(file.clone()) as Arc<dyn File>))).unwrap()
    }

    /// Parent and child as they are opened, the child with a look at whether it is its parent.
    fn open_chain(files: &[SimFile; 2], read_only: bool) -> Result<(Node, Driven)> {
        let options = || OpenOptions { read_only, ..OpenOptions::default() };
        let parent = open_with(&files[0], options())?;
        let parent = Node::new(Arc::new(parent), NodeOptions::default());
        structure(&files[1]).check_parent(Some(&parent))?;
        let backing = Some(parent.clone());
        Ok((parent, open_with(&files[1], OpenOptions { backing, ..options() })?))
    }

    /// As `vublk commit` does it.
    async fn commit(parent: &Node, child: &Driven, held: &[u64]) {
        let identity = |once_changed| parent.driver().identity(once_changed).unwrap();
        child.follow_backing(identity(true)).await.unwrap();
        for offset in held {
            let bytes = read(child, *offset, 4096).await;
            write(&*parent.driver(), *offset, &bytes, false).await.unwrap();
        }
        parent.driver().flush().await.unwrap();
        child.follow_backing(identity(false)).await.unwrap();
        parent.driver().close().await.unwrap();
        child.close().await.unwrap();
    }

    #[test]
    fn a_commit_that_is_cut_leaves_a_child_that_knows_its_parent() {
        let base = new_image("base.vhdx", None);
        let parent = open_image(&base, None, None).unwrap();
        block_on(write(&parent, 0, &vec![1; 2 << 20], true)).unwrap();
        block_on(parent.close()).unwrap();
        let made = block_on(Parent::of(&structure(&base), "base.vhdx", "/base.vhdx")).unwrap();
        let top = new_image("top.vhdx", Some(made));
        let held = [0, MIB + 8192, 2 * MIB];
        let (_, child) = open_chain(&[base.clone(), top.clone()], false).unwrap();
        for (offset, value) in held.iter().zip(2..) {
            block_on(write(&child, *offset, &[value; 4096], false)).unwrap();
        }
        block_on(child.close()).unwrap();
        let shown = block_on(read(&child, 0, SIZE));
        let mut cuts = 0;
        for step in 0.. {
            let files = [base.after_kill(), top.after_kill()];
            let (parent, child) = open_chain(&files, false).unwrap();
            let sim = Sim::new(step);
            files.iter().for_each(|file| sim.attach(file));
            let task = Box::pin(commit(&parent, &child, &held)) as SimTask<'_>;
            let is_done = sim.run_until(vec![task], |now| now == step);
            for seed in 0..6 {
                let cut = files.each_ref().map(|file| match seed {
                    0 => file.after_kill(),
                    seed => file.after_power_cut(seed),
                });
                let (_, child) = open_chain(&cut, seed % 2 == 0)
                    .unwrap_or_else(|err| panic!("step {step}, seed {seed}: {err}"));
                assert!(block_on(read(&child, 0, SIZE)) == shown, "step {step}, seed {seed}");
                // It is done again from wherever it was.
                if seed == 3 {
                    let (parent, child) = open_chain(&cut, false).unwrap();
                    block_on(commit(&parent, &child, &held));
                    let (parent, _) = open_chain(&cut, true).unwrap();
                    assert!(block_on(read(&*parent.driver(), 0, SIZE)) == shown);
                }
                cuts += 1;
            }
            if is_done {
                break;
            }
        }
        assert!(cuts > 200, "{cuts}");
    }

    #[test]
    fn without_room_for_a_second_guid_nothing_is_changed() {
        let file = SimFile::from_bytes(
            "top.vhdx",
            Fixture { has_parent: true, ..Fixture::new(SIZE) }.bytes(),
        );
        let base = new_image("base.vhdx", None);
        let parent =
            Node::new(Arc::new(open_image(&base, None, None).unwrap()), NodeOptions::default());
        let child = open_image(&file, Some(parent), None).unwrap();
        let before = file.volatile();
        let err = block_on(child.follow_backing(7)).unwrap_err().to_string();
        assert!(err.contains("no room for a second GUID") && err.contains("top.vhdx"), "{err}");
        assert!(file.volatile() == before);
    }

    #[test]
    fn only_a_child_that_holds_nothing_takes_a_changed_parent() {
        let base = new_image("base.vhdx", None);
        let made = block_on(Parent::of(&structure(&base), "base.vhdx", "/base.vhdx")).unwrap();
        let top = new_image("top.vhdx", Some(made));
        let guid = |file: &SimFile| structure(file).headers.current.data_write_guid;
        let alone = |file: &SimFile| {
            open_with(file, OpenOptions { alone: true, ..OpenOptions::default() }).unwrap()
        };
        let change = || {
            let parent = open_image(&base, None, None).unwrap();
            block_on(write(&parent, 0, &[1; 4096], true)).unwrap();
            block_on(parent.close()).unwrap();
            u128::from_le_bytes(guid(&base).0)
        };
        let child = alone(&top);
        assert!(block_on(child.adopt_backing(change())).unwrap());
        block_on(child.close()).unwrap();
        let (_, child) = open_chain(&[base.clone(), top.clone()], false).unwrap();
        block_on(write(&child, MIB, &[2; 512], false)).unwrap();
        block_on(child.close()).unwrap();
        let child = alone(&top);
        assert!(!block_on(child.adopt_backing(change())).unwrap());
        block_on(child.close()).unwrap();
        let err = open_chain(&[base, top], false).map(drop).unwrap_err().to_string();
        assert!(err.contains("was modified since"), "{err}");
    }
}
