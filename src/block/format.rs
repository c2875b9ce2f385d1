//! Image formats: metadata only, and the one adapter that turns a format into a driver.
//!
//! A format never moves guest data. It says where ranges lie ([`Format::map`]) and prepares places
//! for writes ([`Format::prepare_write`]); [`FormatDriver`] does the splitting, the zero fill and
//! the payload I/O for all formats alike.

use std::fmt;

use crate::block::driver::{BlockStatus, Driver, Limits, Pin, Plan, PlanExtent, PlanOp, Planned};
use crate::block::link::{self, Link};
use crate::block::{Keep, Node, Quiesced, StatusKind};
use crate::error::{Error, Result};
use crate::io::{AlignedBuf, Alignment, Buffers, File, Fut, carrying};
use crate::units::{ByteRange, align_down, align_up};
use std::sync::Arc;

/// Where a run of the disk lies.
#[derive(Clone, Debug)]
pub enum ExtentKind {
    /// As it is, at `offset` of `file`.
    Data {
        /// The file that holds it.
        file: Arc<dyn File>,
        /// Where in the file.
        offset: u64,
    },
    /// Reads as zeros. `explicit` if the format says so of this run, false if it is merely absent
    /// and there is no backing.
    Zero {
        /// Stated by this layer's metadata.
        explicit: bool,
    },
    /// At the same offset of the backing node (zeros past its end).
    Backing,
    /// Encoded (compressed): only [`Format::read_opaque`] can read it.
    Opaque,
}

/// A run of the disk and where it lies.
#[derive(Clone, Debug)]
pub struct Extent {
    /// The run; never empty.
    pub range: ByteRange,
    /// Where it lies.
    pub kind: ExtentKind,
}

/// Makes a prepared write's mapping visible. Dropping it instead undoes the preparation
/// synchronously.
pub trait WriteCommit {
    /// Called once the data has been written (not necessarily flushed). When this returns, reads
    /// see the data, and the mapping survives the death of this process.
    fn commit<'a>(self: Box<Self>) -> Fut<'a, ()>
    where
        Self: 'a;
}

/// A place for a write. Covers a prefix of the range that was asked for.
pub struct Prepared<'a> {
    /// How much of the range, from its start, may be written now. Never empty.
    pub range: ByteRange,
    /// Where its data goes.
    pub file: Arc<dyn File>,
    /// Offset in the file of the first byte of `range`.
    pub offset: u64,
    /// What makes the data visible; `None` if it is as soon as it is written.
    pub commit: Option<Box<dyn WriteCommit + 'a>>,
    /// Keeps the place from being given to others: held until the host has written the data, even
    /// if the request is dropped before. `None` if it stays what it is, or the file sees to that.
    pub pin: Option<Pin>,
}

impl Prepared<'_> {
    /// Performs an operation of the host's on the place.
    pub async fn perform(&self, operation: impl Future<Output = Result<()>>) -> Result<()> {
        match &self.pin {
            Some(pin) => carrying(Arc::clone(&pin.0), operation).await,
            None => operation.await,
        }
    }
}

/// Anything whose life keeps something as it is.
pub trait Guard {}

impl<T> Guard for T {}

/// An image format. Ranges are inside the disk, aligned and not empty, as for [`Driver`].
pub trait Format: Send + Sync + fmt::Debug {
    /// Name of the driver.
    fn name(&self) -> &'static str;

    /// Fixed properties.
    fn limits(&self) -> Limits;

    /// Resolves a range without waiting, if the metadata is in memory and the extents cannot move
    /// while a request uses them (or `plan.pin` keeps them). See [`Driver::plan`].
    fn plan<'a>(&'a self, op: PlanOp, range: ByteRange, plan: &mut Plan<'a>) -> Planned {
        let _ = (op, range, plan);
        Planned::NotNow
    }

    /// Where the range lies, from its start on; may answer for less than all of it.
    fn map<'a>(&'a self, range: ByteRange) -> Fut<'a, Extent>;

    /// The same for who only wants to know: the range may begin and end anywhere, and nothing is read by
    /// the answer.
    fn look<'a>(&'a self, range: ByteRange) -> Fut<'a, Extent> {
        self.map(range)
    }

    /// Holds the mapping still: while the guard lives, extents got from [`Format::map`] stay valid.
    fn read_guard<'a>(&'a self) -> Fut<'a, Box<dyn Guard + 'a>> {
        Box::pin(async { Ok(Box::new(()) as Box<dyn Guard>) })
    }

    /// Finds or makes a place for a write of a prefix of `range`, copying up what surrounds the
    /// range inside the format's blocks.
    fn prepare_write<'a>(&'a self, range: ByteRange) -> Fut<'a, Prepared<'a>>;

    /// Reads a run that [`Format::map`] called opaque.
    fn read_opaque<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
        let _ = (offset, buf);
        Box::pin(async { Err(Error::unsupported("no encoded data in this format")) })
    }

    /// Makes the range read as zeros.
    fn write_zeroes<'a>(&'a self, range: ByteRange, may_unmap: bool) -> Fut<'a, ()>;

    /// Frees what is cheap to free. Must not let a backing file show through.
    fn discard<'a>(&'a self, range: ByteRange) -> Fut<'a, ()>;

    /// Makes all completed writes durable, mapping included.
    fn flush<'a>(&'a self) -> Fut<'a, ()>;

    /// Changes the size.
    fn resize<'a>(&'a self, size: u64) -> Fut<'a, ()> {
        let _ = size;
        Box::pin(async move {
            Err(Error::unsupported(format!("{} images cannot be resized", self.name())))
        })
    }

    /// See [`Driver::make_empty`].
    fn make_empty<'a>(&'a self, discard: bool) -> Fut<'a, ()> {
        let _ = discard;
        Box::pin(async move {
            Err(Error::unsupported(format!("{} images are not emptied here", self.name())))
        })
    }

    /// The node that [`ExtentKind::Backing`] refers to.
    fn backing(&self) -> Option<Node> {
        None
    }

    /// Puts another node (or none) in the place of the backing; the adapter sees to what plans lead
    /// through. The guard proves that nobody uses the image meanwhile.
    ///
    /// # Errors
    /// If the image has no backing that could change, or cannot stand on that one. Nothing has
    /// changed then.
    fn set_backing(&self, backing: Option<Node>, quiesced: &Quiesced) -> Result<()> {
        let _ = (backing, quiesced);
        Err(Error::unsupported(format!("the backing of {} nodes cannot be changed", self.name())))
    }

    /// See [`Driver::prepare_for_overlay`].
    fn prepare_for_overlay<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    /// See [`Driver::identity`].
    fn identity(&self, once_changed: bool) -> Option<u128> {
        let _ = once_changed;
        None
    }

    /// See [`Driver::follow_backing`].
    fn follow_backing<'a>(&'a self, identity: u128) -> Fut<'a, ()> {
        let _ = identity;
        Box::pin(async { Ok(()) })
    }

    /// See [`Driver::adopt_backing`].
    fn adopt_backing<'a>(&'a self, identity: u128) -> Fut<'a, bool> {
        let _ = identity;
        Box::pin(async { Ok(false) })
    }

    /// See [`Driver::check_rename_backing`].
    fn check_rename_backing<'a>(&'a self, backing: Option<(&'a str, &'a str)>) -> Fut<'a, ()> {
        let _ = backing;
        Box::pin(async { Ok(()) })
    }

    /// See [`Driver::rename_backing`].
    fn rename_backing<'a>(&'a self, backing: Option<(&'a str, &'a str)>) -> Fut<'a, ()> {
        let _ = backing;
        Box::pin(async move {
            Err(Error::unsupported(format!(
                "{} images cannot be made to name another backing file here",
                self.name()
            )))
        })
    }

    /// Format-specific facts for `info`.
    fn details(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// See [`Driver::resume`].
    fn resume<'a>(&'a self, nonce: Option<u128>) -> Fut<'a, ()> {
        let _ = nonce;
        Box::pin(async { Ok(()) })
    }

    /// See [`Driver::begin_session`].
    fn begin_session(&self, nonce: u128) -> Result<()> {
        let _ = nonce;
        Ok(())
    }

    /// See [`Driver::keep`].
    fn keep(&self) -> Option<&Keep> {
        None
    }

    /// Whether whatever made flushes fail so far has lost nothing, and the next one does all of it: no
    /// sync of a file has failed.
    fn can_flush_again(&self) -> bool {
        false
    }

    /// See [`Driver::close`].
    fn close<'a>(&'a self) -> Fut<'a, ()> {
        self.flush()
    }
}

/// The adapter: a driver made of a format.
#[derive(Debug)]
pub struct FormatDriver<F: Format> {
    /// Shared with the one that takes this one's place when the backing changes.
    format: Arc<F>,
    below: Option<Link>,
}

impl<F: Format> FormatDriver<F> {
    /// Turns `format` into a driver.
    ///
    /// # Errors
    /// If it has a backing whose end could not be read.
    pub fn new(format: F) -> Result<Self> {
        format.backing().as_ref().map_or(Ok(()), link::check)?;
        Ok(FormatDriver::linked(Arc::new(format)))
    }

    fn linked(format: Arc<F>) -> Self {
        let below = format.backing().map(|node| Link::new(node, &format.limits()));
        FormatDriver { format, below }
    }

    /// The format inside.
    pub fn format(&self) -> &F {
        &self.format
    }

    async fn read_all(&self, mut offset: u64, buf: Buffers) -> Result<()> {
        let _still = self.format.read_guard().await?;
        let mut done = 0;
        while done < buf.len() {
            let want = ByteRange { offset, len: buf.len() - done };
            let extent = self.format.map(want).await?;
            let len = extent.range.len.min(want.len);
            debug_assert!(extent.range.offset == offset && len > 0);
            let part = buf.slice(done, len);
            match extent.kind {
                ExtentKind::Data { file, offset } => read_file(&*file, offset, part).await?,
                ExtentKind::Zero { .. } => part.fill_zero(),
                ExtentKind::Backing => read_backing(self.format.backing(), offset, part).await?,
                ExtentKind::Opaque => self.format.read_opaque(offset, part).await?,
            }
            offset += len;
            done += len;
        }
        Ok(())
    }

    async fn write_all(&self, mut offset: u64, buf: Buffers, fua: bool) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let want = ByteRange { offset, len: buf.len() - done };
            let place = self.format.prepare_write(want).await?;
            let len = place.range.len.min(want.len);
            debug_assert!(place.range.offset == offset && len > 0);
            let data = buf.slice(done, len);
            place.perform(place.file.write(place.offset, data, false)).await?;
            if let Some(commit) = place.commit {
                commit.commit().await?;
            }
            offset += len;
            done += len;
        }
        if fua {
            self.format.flush().await?;
        }
        Ok(())
    }
}

/// Reads from a file. Runs of a format may be smaller than the units that the host demands.
async fn read_file(file: &dyn File, offset: u64, buf: Buffers) -> Result<()> {
    let Alignment { request, memory } = file.alignment();
    let wanted = ByteRange { offset, len: buf.len() };
    if wanted.is_aligned(request) {
        return file.read(offset, buf).await;
    }
    let whole = units_around(wanted, request, file.len()?);
    let bounce = AlignedBuf::zeroed(whole.len as usize, memory);
    file.read(whole.offset, bounce.buffers()).await?;
    bounce.buffers().slice(offset - whole.offset, buf.len()).copy_to(&buf);
    Ok(())
}

/// The whole units that a range is in, as far as there is something.
fn units_around(range: ByteRange, unit: u64, size: u64) -> ByteRange {
    let end = align_up(range.end(), unit).map_or(size, |end| end.min(size));
    ByteRange::between(align_down(range.offset, unit), end.max(range.end()))
}

/// Reads from a backing node that may be shorter than the disk above it, or absent.
async fn read_backing(backing: Option<Node>, offset: u64, buf: Buffers) -> Result<()> {
    let Some(backing) = backing else {
        buf.fill_zero();
        return Ok(());
    };
    let inside = ByteRange { offset, len: buf.len() }
        .intersect(&ByteRange { offset: 0, len: backing.size() })
        .len;
    let wanted = ByteRange { offset, len: inside };
    let limits = backing.limits();
    if inside > 0 && !wanted.is_aligned(limits.request_alignment) {
        // A sector of this layer may be a part of one below.
        let whole = units_around(wanted, limits.request_alignment, limits.size);
        let bounce = AlignedBuf::zeroed(whole.len as usize, limits.memory_alignment);
        backing.read(whole.offset, bounce.buffers()).await?;
        bounce.buffers().slice(offset - whole.offset, inside).copy_to(&buf.slice(0, inside));
    } else if inside > 0 {
        backing.read(offset, buf.slice(0, inside)).await?;
    }
    if inside < buf.len() {
        buf.slice(inside, buf.len() - inside).fill_zero();
    }
    Ok(())
}

impl<F: Format + 'static> Driver for FormatDriver<F> {
    fn name(&self) -> &'static str {
        self.format.name()
    }

    fn limits(&self) -> Limits {
        self.format.limits()
    }

    #[inline]
    fn plan<'a>(&'a self, op: PlanOp, range: ByteRange, plan: &mut Plan<'a>) -> Planned {
        // One that is above this one goes on with its own when this returns.
        let above = std::mem::replace(&mut plan.below, self.below.as_ref());
        let planned = self.format.plan(op, range, plan);
        plan.below = above;
        planned
    }

    fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
        Box::pin(self.read_all(offset, buf))
    }

    fn write<'a>(&'a self, offset: u64, buf: Buffers, fua: bool) -> Fut<'a, ()> {
        Box::pin(self.write_all(offset, buf, fua))
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, may_unmap: bool) -> Fut<'a, ()> {
        self.format.write_zeroes(range, may_unmap)
    }

    fn discard<'a>(&'a self, range: ByteRange) -> Fut<'a, ()> {
        self.format.discard(range)
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        // What is certain of a file that a format lies on is not certain of the format.
        let judged = |err: Error| err.lost_nothing(self.format.can_flush_again());
        Box::pin(async move { self.format.flush().await.map_err(judged) })
    }

    fn block_status<'a>(&'a self, range: ByteRange) -> Fut<'a, BlockStatus> {
        Box::pin(async move {
            let _still = self.format.read_guard().await?;
            let extent = self.format.look(range).await?;
            let run = extent.range.intersect(&range);
            let status = |kind, host, compressed| BlockStatus {
                range: run,
                kind,
                host,
                depth: 0,
                compressed,
            };
            match extent.kind {
                ExtentKind::Data { file, offset } => {
                    Ok(status(StatusKind::Data, Some((file.name().to_string(), offset)), false))
                }
                ExtentKind::Zero { explicit: true } => Ok(status(StatusKind::Zero, None, false)),
                ExtentKind::Zero { explicit: false } => {
                    Ok(status(StatusKind::Unallocated, None, false))
                }
                ExtentKind::Opaque => Ok(status(StatusKind::Data, None, true)),
                ExtentKind::Backing => Ok(status(StatusKind::Unallocated, None, false)),
            }
        })
    }

    fn resize<'a>(&'a self, size: u64) -> Fut<'a, ()> {
        self.format.resize(size)
    }

    fn make_empty<'a>(&'a self, discard: bool) -> Fut<'a, ()> {
        self.format.make_empty(discard)
    }

    fn children(&self) -> Vec<(&'static str, Node)> {
        self.format.backing().map(|node| ("backing", node)).into_iter().collect()
    }

    fn is_behind(&self) -> bool {
        self.below.as_ref().is_some_and(Link::is_behind)
    }

    fn on_backing(&self, backing: Option<Node>, quiesced: &Quiesced) -> Result<Arc<dyn Driver>> {
        let is_same = match (&backing, &self.format.backing()) {
            (Some(new), Some(old)) => new.is_same(old),
            (new, old) => new.is_none() && old.is_none(),
        };
        if !is_same {
            backing.as_ref().map_or(Ok(()), link::check)?;
            self.format.set_backing(backing, quiesced)?;
        }
        Ok(Arc::new(FormatDriver::linked(Arc::clone(&self.format))))
    }

    fn prepare_for_overlay<'a>(&'a self) -> Fut<'a, ()> {
        self.format.prepare_for_overlay()
    }

    fn identity(&self, once_changed: bool) -> Option<u128> {
        self.format.identity(once_changed)
    }

    fn follow_backing<'a>(&'a self, identity: u128) -> Fut<'a, ()> {
        self.format.follow_backing(identity)
    }

    fn adopt_backing<'a>(&'a self, identity: u128) -> Fut<'a, bool> {
        self.format.adopt_backing(identity)
    }

    fn check_rename_backing<'a>(&'a self, backing: Option<(&'a str, &'a str)>) -> Fut<'a, ()> {
        self.format.check_rename_backing(backing)
    }

    fn rename_backing<'a>(&'a self, backing: Option<(&'a str, &'a str)>) -> Fut<'a, ()> {
        self.format.rename_backing(backing)
    }

    fn details(&self) -> serde_json::Value {
        self.format.details()
    }

    fn resume<'a>(&'a self, nonce: Option<u128>) -> Fut<'a, ()> {
        self.format.resume(nonce)
    }

    fn begin_session(&self, nonce: u128) -> Result<()> {
        self.format.begin_session(nonce)
    }

    fn keep(&self) -> Option<&Keep> {
        self.format.keep()
    }

    fn close<'a>(&'a self) -> Fut<'a, ()> {
        self.format.close()
    }
}

/// Appends a file extent to a plan, if the file can take part in one.
pub fn plan_file<'a>(
    plan: &mut Plan<'a>,
    file: &'a Arc<dyn File>,
    offset: u64,
    len: u64,
) -> Planned {
    match file.as_host() {
        Some(file) => {
            plan.extents.push(PlanExtent::File { file, offset, len });
            Planned::Ready
        }
        None => Planned::NotNow,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::NodeOptions;
    use crate::io::block_on;

    /// Lies on a file that is certain to have lost nothing, and cannot be flushed.
    #[derive(Debug)]
    struct Failing;

    impl Format for Failing {
        fn name(&self) -> &'static str {
            "failing"
        }

        fn limits(&self) -> Limits {
            Limits {
                size: 4096,
                request_alignment: 1,
                memory_alignment: 1,
                optimal_io: 0,
                discard_granularity: 0,
                read_only: false,
            }
        }

        fn map<'a>(&'a self, range: ByteRange) -> Fut<'a, Extent> {
            Box::pin(async move { Ok(Extent { range, kind: ExtentKind::Zero { explicit: true } }) })
        }

        fn prepare_write<'a>(&'a self, _range: ByteRange) -> Fut<'a, Prepared<'a>> {
            unreachable!("nothing is written")
        }

        fn write_zeroes<'a>(&'a self, _range: ByteRange, _may_unmap: bool) -> Fut<'a, ()> {
            Box::pin(async { Ok(()) })
        }

        fn discard<'a>(&'a self, _range: ByteRange) -> Fut<'a, ()> {
            Box::pin(async { Ok(()) })
        }

        fn flush<'a>(&'a self) -> Fut<'a, ()> {
            Box::pin(async { Err(Error::from_errno(libc::ENOSPC).lost_nothing(true)) })
        }
    }

    #[test]
    fn what_is_certain_of_a_file_is_not_certain_of_a_format() {
        let node = Node::new(Arc::new(FormatDriver::new(Failing).unwrap()), NodeOptions::default());
        block_on(node.flush()).unwrap_err();
        assert!(node.is_poisoned());
    }
}
