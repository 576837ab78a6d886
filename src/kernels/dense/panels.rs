//! How the product of many rows is shared out: by panels of the weight, each a task, whose result is
//! transposed while it is in the cache.

use std::cell::RefCell;
use std::ops::Range;
use std::thread::LocalKey;

use rayon::prelude::*;

/// The most rows of the weight that one task multiplies. Widened to `f32`, 512 numbers of each are 96 KiB,
/// which the second-level cache holds beside a tile of `x`.
pub(in crate::kernels) const PANEL: usize = 48;

/// A multiple of the rows of every micro-panel.
const MICRO_PANELS: usize = 12;

/// Rows and columns that are transposed at a time: a cache line.
pub(in crate::kernels) const SIDE: usize = 16;

/// `x Wᵀ`, `(rows, out)`, where `multiply` writes the columns of some rows of the weight, at most
/// [`PANEL`]: `(their number, padded)`, of which the first `rows` of each count. It must not wait for
/// other tasks.
pub(in crate::kernels) fn by_panels(
    (rows, padded): (usize, usize),
    out: usize,
    multiply: impl Fn(Range<usize>, &mut [f32]) + Sync,
) -> Vec<f32> {
    thread_local! {
        static COLUMNS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    let of_thread = out.div_ceil(rayon::current_num_threads());
    let panel = of_thread.next_multiple_of(MICRO_PANELS).clamp(MICRO_PANELS, PANEL);
    // Not zeroed, as all of it is written.
    let mut y: Vec<f32> = Vec::with_capacity(rows * out);
    let columns_of_y = Columns { first: y.as_mut_ptr(), rows, out };
    (0..out.div_ceil(panel)).into_par_iter().for_each(|task| {
        let of_panel = task * panel..out.min((task + 1) * panel);
        with_room(&COLUMNS, of_panel.len() * padded, |columns| {
            multiply(of_panel.clone(), columns);
            // SAFETY: `y` lives, has room for `rows · out` elements and is not touched otherwise
            // while this runs, and no other task has these columns.
            unsafe { columns_of_y.write(of_panel, columns, padded) };
        });
    });
    // SAFETY: there is room for them, and the panels, each of which has written all of its columns,
    // are all rows of the weight, which are all columns of `y`.
    unsafe { y.set_len(rows * out) };
    y
}

/// Lends a buffer that this thread keeps from one product to the next, with its old contents.
pub(in crate::kernels) fn with_room<T: Copy + Default, R>(
    room: &'static LocalKey<RefCell<Vec<T>>>,
    len: usize,
    work: impl FnOnce(&mut [T]) -> R,
) -> R {
    room.with_borrow_mut(|room| {
        if room.len() < len {
            room.resize(len, T::default());
        }
        work(&mut room[..len])
    })
}

/// The columns of `y`, `(rows, out)`, of which each task writes its own.
struct Columns {
    first: *mut f32,
    rows: usize,
    out: usize,
}

// SAFETY: it is only used for writing, by `write`, whose callers keep to columns of their own.
unsafe impl Sync for Columns {}

impl Columns {
    /// `y[r][of[c]] = columns[c][r]`. By squares, so that whole cache lines are read and whole lines
    /// are written: rows often lie a power of two apart, where a cache has no room for one line of
    /// each.
    ///
    /// # Safety
    /// `y` has room for `rows · out` elements, lives, and nobody else reads or writes columns `of` of it.
    unsafe fn write(&self, of: Range<usize>, columns: &[f32], padded: usize) {
        assert!(of.end <= self.out && self.rows <= padded && of.len() * padded <= columns.len());
        for top in (0..self.rows).step_by(SIDE) {
            let height = SIDE.min(self.rows - top);
            for left in (0..of.len()).step_by(SIDE) {
                let width = SIDE.min(of.len() - left);
                let mut square = [[0f32; SIDE]; SIDE];
                for column in 0..width {
                    let from = &columns[(left + column) * padded + top..][..height];
                    for (row, from) in square.iter_mut().zip(from) {
                        row[column] = *from;
                    }
                }
                for (row, square) in square[..height].iter().enumerate() {
                    let at = (top + row) * self.out + of.start + left;
                    // SAFETY: `top + row < rows` and `of.start + left + width <= of.end <= out`, so
                    // these elements are in `y`, and in its columns `of`.
                    unsafe { self.first.add(at).copy_from_nonoverlapping(square.as_ptr(), width) };
                }
            }
        }
    }
}
